/* The Node side: runs one program for the agent, whichever way it serves HTTP.
 *
 * Started as `node node.cjs FILE EXPORT [ARGUMENT...]` in the program's folder, Node 14 or
 * later, standard library only. FILE is absolute; EXPORT may be empty. Environment: PORT and
 * HOST, what the program should listen on; NODE_PATH, folders of packages. fd 3 is a TCP socket
 * that listens there already, fd 4 one end of a Unix stream socket that carries two kinds of
 * frame to the agent (agent.h has their layout): READY once a server of the program accepts on
 * fd 3, START_FAILED when that will never be (or none, and stderr has the reason). fd 5 is a Unix
 * socket that listens for the agent; its connections are to the program as any of fd 3. fds 1 and
 * 2 are the program's log.
 *
 * To the program all is as under `node FILE`, but one listen() lands on fd 3, the one of the
 * highest rank (of equals the first); it takes over from a lower one that came earlier:
 *
 *     PORT     any server's listen on $PORT
 *     NAMED    the agent asked for EXPORT
 *     LISTENS  an http.Server's listen on another port
 *     EXPORTS  the program has loaded, did none of these, and its default export (or
 *              module.exports) serves: a request listener (Express), an http.Server, an
 *              instance of Koa or Fastify, a fetch handler (Node 18)
 *     ANY      an http.Server's listen on port 0
 *
 * Every other listen() is real. NODE_PATH serves ES modules too, from Node 18.19 on; an older
 * Node finds their packages in the folders above FILE only.
 *
 * Exit codes: the program's own, after START_FAILED never 0.
 */
'use strict';

const fs = require('fs');
const http = require('http');
const Module = require('module');
const net = require('net');
const path = require('path');
const stream = require('stream');
const { pathToFileURL } = require('url');
const { inspect } = require('util');

const LISTEN_FD = 3, AGENT_FD = 4, NEAR_FD = 5;
const BACKLOG = 4096;                               // LISTEN_BACKLOG of the agent
const READY = 8, START_FAILED = 9;                  // enum frame_type
const MESSAGE_MAX = 4 << 10, DETAILS_MAX = 24 << 10;    // characters; the agent keeps less
const AWAITS = 13;                                  // Node's exit code for an await that never ends
const REAL = 0, ANY = 1, EXPORTS = 2, LISTENS = 3, NAMED = 4, PORT = 5;

const [, , file, exportName = ''] = process.argv;
const { HOST: host = '127.0.0.1' } = process.env;
const port = Number(process.env.PORT);

/* ---- What the agent is told ---- */

let told = false;
let lastError = null;                               // { error } that no handler took
let importing = false;

function tell(type, payload = '') {
    const body = Buffer.from(payload), head = Buffer.alloc(12);
    head.writeUInt32LE(body.length, 0);
    head[8] = type;
    told = true;
    fs.writeSync(AGENT_FD, Buffer.concat([head, body]));
}

function ready() {
    if (!told) {
        listenNear(landed.server._handle);
        tell(READY);
    }
    process.removeListener('unhandledRejection', raise);
}

function tellFailed(message, details = '') {
    const clean = (text) => text.replace(/\0/g, '\\0');
    tell(START_FAILED, clean(message).slice(0, MESSAGE_MAX) + '\0' + clean(details).slice(0, DETAILS_MAX));
}

/* For what only we can see; the program's own errors end it as they would without us. */
function fail(message) {
    tellFailed(message);
    console.error(message);
    process.exit(1);
}

function describe(error) {
    return error instanceof Error ? `${error.name}: ${error.message}`.split('\n')[0] : `Uncaught ${inspect(error)}`;
}

/* As Node prints it, without the lines of this file. */
function format(error) {
    return inspect(error).split('\n').filter((line) => !line.includes(__filename)).join('\n');
}

/* Where a syntax error in an ES module stands says only what Node writes to stderr as it ends:
 * we stay silent, and the agent reports that. */
function isNowhere(error) {
    return error instanceof SyntaxError && !/(^|[( ]|file:\/\/)\/.*:\d/m.test(error.stack);
}

/* Before Node 15 a rejection that nobody handles is only a warning. */
function raise(reason) {
    if (process.listenerCount('unhandledRejection') === 1)
        throw reason;
}
if (parseInt(process.versions.node) < 15)
    process.on('unhandledRejection', raise);

process.on('uncaughtExceptionMonitor', (error) => { lastError = { error }; });

/* Every end of the program but a signal passes here. */
process.on('exit', (code) => {
    if (told)
        return;
    const name = path.basename(file);
    if (lastError && isNowhere(lastError.error))
        return;
    if (lastError)
        tellFailed(describe(lastError.error), format(lastError.error));
    else if (importing && (code === 0 || code === AWAITS))
        tellFailed(`${name} ended while it loaded: a top-level await never ends, or process.exit() came first`);
    else if (code !== 0)
        tellFailed(`${name} exited with code ${code} before it listened`);
    else
        tellFailed(`${name} neither listens nor exports what can serve requests` + listed);
    process.exitCode = code || (importing ? AWAITS : 1);
});

/* ---- Which listen() lands on fd 3 ---- */

const { listen } = net.Server.prototype;
let landed = null;                                  // { server, rank, args: the program's, or null }
let exported = {};                                  // { server, rank } that we ask to listen

function rankOf(server, [first, second]) {
    if (server === exported.server)
        return exported.rank;
    const isOptions = typeof first === 'object' && first !== null;
    if (isOptions && (!('port' in first) || first.fd >= 0 || first._handle))
        return REAL;
    let [wanted, address] = isOptions ? [first.port, first.host] : [first, second];
    if (wanted === undefined || wanted === null || typeof wanted === 'function')
        wanted = 0;
    if (!['number', 'string'].includes(typeof wanted) || wanted === '' || !(wanted >= 0))
        return REAL;                                // a path, or an error for Node to raise
    // A server without a listener only tries whether the port is free. Fastify, asked for
    // localhost, listens on its other addresses too, at the port that it got on the first.
    const isElsewhere = net.isIP(address || '') !== 0 && !['127.0.0.1', '0.0.0.0', '::'].includes(address);
    if (Number(wanted) === port && isElsewhere && landed)
        return REAL;
    if (Number(wanted) === port && !isElsewhere && server.listenerCount('connection') > 0)
        return PORT;
    return !(server instanceof http.Server) ? REAL : Number(wanted) === 0 ? ANY : LISTENS;
}

net.Server.prototype.listen = function (...args) {
    const rank = rankOf(this, args), last = args[args.length - 1];
    const callback = typeof last === 'function' ? [last] : [];

    if (landed && landed.server === this && !landed.args && this.listening) {
        // The program listens with what it exported.
        landed = { server: this, rank: Math.max(rank, landed.rank), args };
        if (callback.length > 0)
            this.once('listening', last);
        process.nextTick(() => this.emit('listening'));
        return this;
    }
    // Once the server on fd 3 is closed, so is fd 3.
    if (this.listening || (landed ? rank <= landed.rank || !landed.server.listening : rank === REAL))
        return listen.apply(this, args);
    return land(this, rank, args, callback);
};

function land(server, rank, args, callback) {
    const before = landed;

    landed = { server, rank, args: server === exported.server ? null : args };
    if (!before) {
        const options = typeof args[0] === 'object' ? args[0] : {};
        listen.call(server, { ...options, fd: LISTEN_FD }, ...callback);
    } else {
        listen.call(server, before.server, ...callback);    // shares the handle, and owns it now
        before.server._handle = null;
        if (before.args)
            listen.apply(before.server, before.args.filter((value) => typeof value !== 'function'));  // called before
    }
    // The agent keeps connections open; which end closes an idle one must not be a race.
    if (server instanceof http.Server)
        server.keepAliveTimeout = 0;
    server.once('listening', () => process.nextTick(ready));     // when others have seen it, too
    return server;
}

/* What comes by fd 5 goes to the server on fd 3, with the addresses that it would have there.
 * Where cluster has taken that server's handle for its workers, they would lack the addresses:
 * without fd 5 the agent comes by fd 3. */
function listenNear(handle) {
    if (!handle)
        return fs.closeSync(NEAR_FD);
    const near = net.createServer();
    const tells = (at) => (out) => {
        Object.assign(out, { address: '127.0.0.1', family: 'IPv4', port: at });
        return 0;
    };
    let from = 0;

    listen.call(near, { fd: NEAR_FD }, BACKLOG);
    near.unref();                                   // alone it keeps no program alive
    near._handle.onconnection = (error, client) => {
        if (!client)
            return handle.onconnection(error);
        if (handle.fd < 0)                          // the program has closed its server
            return client.close();
        from = from % 65535 + 1;
        client.getpeername = tells(from);
        client.getsockname = tells(port);
        handle.onconnection(error, client);
    };
}

/* ---- What the program exports ---- */

let listed = '';                                    // the names, for an error message

function take(exports) {
    const of = (value) => (value === null || value === undefined ? [] : Object.keys(value));
    const names = [...new Set([...of(exports), ...of(exports && exports.default)])].slice(0, 20);
    if (names.length > 0)
        listed = `; it exports ${names.join(', ')}`;
    if (landed && landed.rank > (exportName ? NAMED : EXPORTS))
        return;
    const inner = exports ? exports.default : undefined;
    const found = exportName ? [exports, inner].map((from) => (from ? from[exportName] : undefined)) : [inner, exports];
    if (exportName && found.every((value) => value === undefined))
        fail(`${path.basename(file)} has no export ${exportName}${listed}`);
    if (!found.some(serve) && exportName)
        fail(`${path.basename(file)}: the export ${exportName} can serve no requests`);
}

/* False: it is nothing that serves. */
function serve(value) {
    const server = serverOf(value);

    if (!server)
        return false;
    if (server.listening)
        return true;
    exported = { server, rank: exportName ? NAMED : EXPORTS };
    if (server === value || server !== value.server) {
        server.listen(port, host);
        return true;
    }
    // Fastify. It refuses to listen twice, which is what a program does that calls listen() later.
    const listening = Promise.resolve(value.listen({ port, host }));
    value.listen = (...args) => {
        const last = args[args.length - 1];
        return typeof last === 'function' ? void listening.then((address) => last(null, address), last) : listening;
    };
    return true;
}

function serverOf(value) {
    if (value instanceof http.Server)
        return value;
    if (typeof value === 'function')
        return http.createServer(exportName === 'fetch' || /^(bound )?fetch$/.test(value.name) ? fetchListener(value) : value);
    if (typeof value !== 'object' || value === null)
        return null;
    if (typeof value.fetch === 'function')          // Hono, too
        return http.createServer(fetchListener((request) => value.fetch(request)));
    if (value.server instanceof http.Server && typeof value.listen === 'function')
        return value.server;
    if (typeof value.callback === 'function')       // Koa
        return http.createServer(value.callback());
    return null;
}

/* ---- fetch handlers ---- */

function fetchListener(handler) {
    if (typeof Request !== 'function')
        fail(`${path.basename(file)} exports a fetch handler, which needs Node 18; this is ${process.version}`);
    return async (req, res) => {
        try {
            await respond(res, await handler(requestOf(req, res)));
        } catch (error) {
            if (res.destroyed)                      // nobody waits for the answer any more
                return;
            console.error(error);
            if (res.headersSent)
                return res.destroy();
            for (const name of res.getHeaderNames())
                res.removeHeader(name);
            res.writeHead(500, { 'content-type': 'text/plain' }).end('Internal Server Error\n');
        }
    };
}

function requestOf(req, res) {
    const { method, headers, rawHeaders } = req;
    const scheme = headers['x-forwarded-proto'] === 'https' ? 'https' : 'http';
    const abort = new AbortController();
    const fields = new Headers();

    for (let i = 0; i < rawHeaders.length; i += 2)
        fields.append(rawHeaders[i], rawHeaders[i + 1]);
    res.once('close', () => res.writableFinished || abort.abort());
    const hasBody = method !== 'GET' && method !== 'HEAD'
        && (headers['transfer-encoding'] !== undefined || Number(headers['content-length']) > 0);
    const target = req.url.startsWith('/') ? req.url : '/' + req.url;       // OPTIONS *
    const request = new Request(`${scheme}://${headers.host || `${host}:${port}`}${target}`, {
        method, headers: fields, signal: abort.signal,
        body: hasBody ? stream.Readable.toWeb(req) : null, duplex: 'half',
    });
    // A body that nobody reads would block the connection.
    res.once('finish', () => request.bodyUsed || req.removeAllListeners('data').resume());
    return request;
}

async function respond(res, response) {
    const cookies = [];

    res.statusCode = response.status;
    if (response.statusText)
        res.statusMessage = response.statusText;
    response.headers.forEach((value, name) => {
        if (name === 'set-cookie')                  // the only one that comes more than once
            cookies.push(value);
        else
            res.setHeader(name, value);
    });
    if (cookies.length > 0)
        res.setHeader('set-cookie', cookies);
    if (!response.body)
        return res.end();
    res.flushHeaders();                             // the first piece of the body may be long in coming
    await stream.promises.pipeline(stream.Readable.fromWeb(response.body), res);
}

/* ---- Start ---- */

/* import looks only into the node_modules above the file that imports. Where NODE_PATH names
 * others, a failed import is tried again from beside them. */
function importFromNodePath() {
    const isAbove = (folder) => file.startsWith(path.join(folder, '..', '/'));
    const folders = (process.env.NODE_PATH || '').split(':').filter((folder) =>
        path.basename(folder) === 'node_modules' && !isAbove(folder) && fs.existsSync(folder));
    if (folders.length === 0 || !Module.register)
        return;
    const beside = folders.map((folder) => pathToFileURL(folder + '.js').href);
    const source = `const beside = ${JSON.stringify(beside)};\nexport ${resolve}`;
    Module.register('data:text/javascript,' + encodeURIComponent(source));
}

/* Runs in a thread of Node's own, as text. */
async function resolve(specifier, context, next) {
    try {
        return await next(specifier, context);
    } catch (error) {
        if (error.code !== 'ERR_MODULE_NOT_FOUND' || /^[./]|^[a-z]+:/.test(specifier))
            throw error;
        for (const parentURL of beside) {           // eslint-disable-line no-undef
            try {
                return await next(specifier, { ...context, parentURL });
            } catch { /* the first error is the one that says who imports */ }
        }
        throw error;
    }
}

process.argv.splice(1, 3, file);
importFromNodePath();
process.mainModule = undefined;                     // as for an ES module; runMain sets it for others
Module.runMain();
if (process.mainModule) {
    take(process.mainModule.exports);
} else {
    importing = true;
    import(pathToFileURL(fs.realpathSync(file)).href).then((exports) => {
        importing = false;
        take(exports);
    }, () => { /* runMain raises it */ });
}
