// A request listener that answers with what it sees, and what of it a program can see.
'use strict';

module.exports = (req, res) => {
    const parts = [];
    req.on('data', (part) => parts.push(part));
    req.on('end', () => {
        res.setHeader('content-type', 'application/json');
        res.end(JSON.stringify({
            method: req.method, url: req.url, event: req.headers['aleph-event'],
            body: Buffer.concat(parts).toString(), remote: req.socket.remoteAddress,
            port: req.socket.server ? req.socket.server.address().port : undefined,
            idle: req.socket.server ? req.socket.server.keepAliveTimeout : undefined,
            argv: process.argv.slice(1), version: process.version,
        }));
    });
};
