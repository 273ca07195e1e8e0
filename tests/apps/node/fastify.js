const app = module.exports = require('fastify')();
const hooks = [];
if (app.addHook)
    app.addHook('onReady', async () => { hooks.push('ready'); });
app.get('/ip', async (req) => ({ ip: req.ip, query: req.query, hooks, port: app.server.address().port,
    idle: app.server.keepAliveTimeout }));
if (process.env.LISTEN === 'now')
    app.listen({ port: 3000 }).then(() => console.log('listening'));
if (process.env.LISTEN === 'later')
    setTimeout(() => app.listen({ port: 3000 }, (error, address) => console.log('listening', error, address)), 100);
