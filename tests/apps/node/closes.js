// Closes its server in the midst of a request, which it answers before it ends; STAYS: it does not end.
const server = require('http').createServer((req, res) => {
    if (req.url !== '/close')
        return res.end(JSON.stringify([req.socket.remoteAddress, req.socket.remotePort, req.socket.localPort]));
    server.close(() => process.env.STAYS || process.exit(7));
    setTimeout(() => res.end('answered'), 200);
}).listen(process.env.PORT);
if (process.env.STAYS)
    setInterval(() => {}, 1000);
