// As an exported Fastify does for localhost: the port of the first server, on other addresses.
const http = require('http');
const first = module.exports = http.createServer((req, res) => res.end(JSON.stringify(first.address())));
const more = ['::1', '127.0.0.9'];
first.once('listening', () => more.forEach((host) => http.createServer(() => {})
    .once('error', () => {}).listen(first.address().port, host)));
setTimeout(() => console.log('all listen'), 200);
