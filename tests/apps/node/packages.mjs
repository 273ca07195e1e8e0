import name from 'only-in-node-path';
import { inner } from 'only-in-node-path/inner';
export default (req, res) => res.end(name + inner);
