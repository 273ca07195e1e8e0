// HTTP by hand, and a look whether the port is free.
const net = require('net');
const tries = net.createServer().once('error', (error) => {
    net.createServer((socket) => socket.once('data', () =>
        socket.end('HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n' + error.code))).listen(process.env.PORT);
}).listen(process.env.PORT);
