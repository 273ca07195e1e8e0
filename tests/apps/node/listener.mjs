import facts from './facts.js';
await new Promise((resolve) => setTimeout(resolve, 20));
export default facts;
export const other = (req, res) => res.end('other');
export const self = (req, res) => res.end(JSON.stringify({
    url: import.meta.url, argv: process.argv[1], main: import.meta.main }));
