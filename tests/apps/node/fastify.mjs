import Fastify from 'fastify';
const app = Fastify();
app.get('/ip', async (req) => ({ ip: req.ip, query: req.query }));
await app.listen({ port: 3000, host: process.env.HOST });
