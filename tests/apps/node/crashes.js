require('http').createServer((req, res) => {
    if (req.url === '/throw')
        throw new RangeError('after readiness');
    if (req.url === '/reject')
        Promise.reject(new RangeError('after readiness'));
    res.end('fine');
}).listen(3456);
