const blocker = require('net').createServer().listen(0, '127.0.0.1', () =>
    require('net').createServer(() => {}).listen(blocker.address().port, '127.0.0.1'));
