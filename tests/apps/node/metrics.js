// Another server first, the program's own much later, on $PORT.
const http = require('http');
const metrics = http.createServer((req, res) => res.end('metrics'));
metrics.on('listening', () => console.log('metrics on', metrics.address().port));
metrics.listen(9464, process.env.METRICS_HOST, () => setTimeout(() => {
    const server = http.createServer((req, res) => res.end(JSON.stringify({ main: server.address().port })));
    server.listen(process.env.PORT);
}, 100));
