'use strict';
const hello = Buffer.from('hello, world\n');

require('http').createServer((request, response) => {
    response.writeHead(200, { 'content-type': 'text/plain', 'content-length': hello.length });
    response.end(hello);
}).listen(process.env.PORT, '127.0.0.1');
