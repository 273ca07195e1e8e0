// Exports nothing and listens when it is told to.
const http = require('http');
process.once('SIGUSR2', () => http.createServer(require('./facts')).listen(3456));
setInterval(() => {}, 1000);
console.log('waiting');
