import { Hono } from 'hono';
const app = new Hono();
app.get('/ip', (c) => c.json({ query: c.req.query() }));
export default app;
