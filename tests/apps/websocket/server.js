// The same for Node, by the package ws: /echo and /bye?CODE; for a browser /browser, /report, /log and /clear.
const http = require('http');
const { WebSocketServer } = require('ws');

const log = [];
const page = require('fs').readFileSync(__dirname + '/browser.html');
const server = http.createServer((request, response) => {
    const [path, query] = request.url.split('?');
    if (path === '/report') log.push(query);
    if (path === '/clear') log.length = 0;
    response.end(path === '/log' ? JSON.stringify(log) : path === '/browser' ? page : 'hello');
});
const sockets = new WebSocketServer({ server, maxPayload: 17 << 20, handleProtocols: (all) => [...all][0] });

sockets.on('connection', (socket, request) => {
    const [path, query] = request.url.split('?');
    socket.on('error', () => {});
    socket.on('message', (data, isBinary) => socket.send(data, { binary: isBinary }));
    if (path === '/bye') socket.close(Number(query), 'so it is');
});
server.listen(process.env.PORT);
