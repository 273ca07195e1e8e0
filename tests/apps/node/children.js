// What a child of the program has open.
const { spawn, fork } = require('child_process');
const path = require('path');
const list = 'console.log(require("fs").readdirSync("/proc/self/fd").map((fd) => { ' +
    'try { return fd + " " + require("fs").readlinkSync("/proc/self/fd/" + fd); } catch { return ""; } }).join("\\n"))';
module.exports = (req, res) => {
    const child = spawn(process.execPath, ['-e', list], { stdio: ['ignore', 'pipe', 'inherit'] });
    child.stdout.pipe(res);
};
