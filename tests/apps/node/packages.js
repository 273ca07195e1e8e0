const name = require('only-in-node-path');
module.exports = (req, res) => res.end(name);
