const Koa = require('koa');
const app = new Koa();
app.use((ctx) => { ctx.body = { ip: ctx.ip, path: ctx.path, query: ctx.query }; });
module.exports = app;
module.exports.handler = app.callback();
