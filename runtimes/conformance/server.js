// What a Node program can show of its runtime.
'use strict';
require('http').createServer((request, response) => {
  response.end(`node ${request.method} ${request.url}`);
}).listen(process.env.PORT || 8080, process.env.HOST || '127.0.0.1');
