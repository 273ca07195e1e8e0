// What the documentation of Node begins with, after as many seconds as its argument says.
const http = require('http');

const server = http.createServer((req, res) => {
    let bytes = 0;
    req.on('data', part => { bytes += part.length; });
    req.on('end', () => {
        res.setHeader('Set-Cookie', ['a=1', 'b=2']);
        if (req.url === '/stream') {
            for (let i = 0; i < 1000; i++)
                res.write(String(i).padStart(5, '0'));
            res.end();
        } else {
            res.end(`node ${req.method} ${req.url} ${bytes}\n`);
        }
    });
});
setTimeout(() => server.listen(process.env.PORT, process.env.HOST), 1000 * (process.argv[2] || 0));
