const cluster = require('cluster');
if (cluster.isMaster)
    for (let i = 0; i < 2; i++)
        cluster.fork();
else
    require('http').createServer((req, res) => res.end(JSON.stringify({ worker: cluster.worker.id })))
        .listen(process.env.PORT);
