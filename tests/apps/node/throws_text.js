throw 'only text\0with a NUL';
