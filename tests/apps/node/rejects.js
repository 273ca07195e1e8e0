setTimeout(() => Promise.reject(new RangeError('nobody handles it')), 10);
setInterval(() => {}, 1000);
