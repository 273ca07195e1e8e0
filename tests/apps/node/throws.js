'use strict';
const inner = () => { throw new TypeError('on purpose\nsecond line'); };
inner();
