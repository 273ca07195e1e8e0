exports.fetch = (request) => new Response('fetched ' + request.method);
