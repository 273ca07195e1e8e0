const express = require('express');
const app = module.exports = express();
app.get('/ip', (req, res) => res.json({ ip: req.ip, query: req.query }));
if (process.env.LISTEN)
    app.listen(3000, () => console.log('listening'));
