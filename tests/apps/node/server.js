// Exports the server, and listens with it all the same.
const server = module.exports = require('http').createServer(require('./facts'));
setTimeout(() => server.listen(3456, () => console.log('own listen', server.address().port)), 50);
