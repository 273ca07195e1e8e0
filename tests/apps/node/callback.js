// The callback of listen() throws: the program never got to serve.
require('http').createServer(() => {}).listen(3456, () => { throw new Error('in the callback'); });
