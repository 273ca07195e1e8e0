// A name that the module does not export.
import { nothing } from './listener.mjs';
export default nothing;
