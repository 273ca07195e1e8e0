// The same for Node, by the package ws: /echo, and /bye?CODE.
const http = require('http');
const { WebSocketServer } = require('ws');

const server = http.createServer((request, response) => response.end('hello'));
const sockets = new WebSocketServer({ server, maxPayload: 17 << 20, handleProtocols: (all) => [...all][0] });

sockets.on('connection', (socket, request) => {
    const [path, query] = request.url.split('?');
    socket.on('error', () => {});
    socket.on('message', (data, isBinary) => socket.send(data, { binary: isBinary }));
    if (path === '/bye') socket.close(Number(query), 'so it is');
});
server.listen(process.env.PORT);
