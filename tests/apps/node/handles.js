// Handles its own errors: none of these is its end.
process.on('uncaughtException', (error) => console.log('handled', error.message));
process.on('unhandledRejection', (error) => console.log('handled', error.message));
Promise.reject(new Error('rejection'));
setTimeout(() => { throw new Error('exception'); }, 10);
setTimeout(() => require('http').createServer(require('./facts')).listen(3456), 50);
