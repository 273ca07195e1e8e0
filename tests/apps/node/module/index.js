import http from 'http';
import facts from '../facts.js';

const server = http.createServer(facts);
await new Promise((resolve) => server.listen({ port: 3456, host: '0.0.0.0' }, resolve));
server.removeAllListeners('request').on('request', (req, res) => res.end(JSON.stringify(server.address())));
