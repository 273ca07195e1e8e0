// What it exports only looks like a request listener.
const http = require('http');
module.exports = function createApp() {
    return require('./facts');
};
setTimeout(() => http.createServer(module.exports()).listen(3456), 50);
