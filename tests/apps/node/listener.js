module.exports = require('./facts');
module.exports.other = (req, res) => res.end('other');
module.exports.number = 1;
