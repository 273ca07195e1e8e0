// Another server first, the program's own much later, on $PORT.
const http = require('http');
const metrics = http.createServer((req, res) => res.end('metrics'));
metrics.listen(Number(process.env.METRICS_PORT), '127.0.0.1', () => setTimeout(() => {
    const server = http.createServer((req, res) => res.end(JSON.stringify({
        main: server.address().port, metrics: metrics.address().port })));
    server.listen(process.env.PORT, () => console.log('the program listens'));
}, 100));
