// The client of the package ws against a server of WebSockets; run by websocket.sh.
//
//     websocket_client.js LABEL URL
//
// The server and the output are those of websocket_clients.py.
'use strict';
const { once } = require('events');
const WebSocket = require('ws');

const [label, url] = process.argv.slice(2);

function check(name, good, why) {
    console.log(good ? `ok ${label}: ${name}` : `FAIL ${label}: ${name}: ${why}`);
}

async function open(path) {
    const socket = new WebSocket(url + path, ['chat'], { maxPayload: 64 << 20 });
    await once(socket, 'open');
    return socket;
}

async function echo(socket, data, options = {}) {
    const answer = once(socket, 'message');
    socket.send(data, options);
    return (await answer)[0];
}

(async () => {
    const socket = await open('/echo');
    check('no compression is agreed on', socket.extensions === '', socket.extensions);
    check('the subprotocol', socket.protocol === 'chat', socket.protocol);
    for (const text of ['', 'h\u00e9 \u{1f600}', 'x'.repeat(300000)])
        check(`text of ${text.length} characters`, String(await echo(socket, text)) === text);
    const data = Buffer.alloc(16 << 20, 'abcdefg');
    const answer = once(socket, 'message');
    for (let at = 0; at < data.length; at += 100000)
        socket.send(data.subarray(at, at + 100000), { binary: true, fin: at + 100000 >= data.length });
    check('16 MiB in 168 fragments', data.equals((await answer)[0]));
    const pong = once(socket, 'pong');
    socket.ping('there?');
    check('a ping is answered', String((await pong)[0]) === 'there?');
    const ended = once(socket, 'close');
    socket.close(3456, 'done');
    check('our code is answered', (await ended)[0] === 3456);
    for (const code of [1000, 1001, 1008, 1011, 3000, 4999]) {
        const [got] = await once(await open(`/bye?${code}`), 'close');
        check(`its code ${code} comes`, got === code, got);
    }
    const wrong = await open('/echo');
    wrong._socket.write(Buffer.from([0x81, 0x82, 0, 0, 0, 0, 0xff, 0xff]));    // masked with zeros
    const [code] = await once(wrong, 'close');
    check('what is no UTF-8 is 1007', code === 1007, code);
})();
