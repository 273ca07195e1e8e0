await Promise.reject(new RangeError('nobody handles it'));
export default () => {};
