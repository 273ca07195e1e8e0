// A fetch handler, as the default export of an edge runtime.
export default {
    greeting: 'hello',
    async fetch(request) {
        const url = new URL(request.url);
        switch (url.pathname) {
        case '/echo':
            return new Response(await request.text(), {
                status: 201, statusText: 'Echoed', headers: [['x-length', request.headers.get('content-length')],
                    ['set-cookie', 'a=1'], ['set-cookie', 'b=2, 3']] });
        case '/stream': {
            let n = 0;
            const body = new ReadableStream({
                async pull(controller) {
                    if (n++ === 3)
                        return controller.close();
                    await new Promise((resolve) => setTimeout(resolve, n > 1 ? 150 : 0));
                    controller.enqueue(new TextEncoder().encode(`part ${n}\n`));
                },
            });
            return new Response(body);
        }
        case '/forever':
            request.signal.addEventListener('abort', () => console.log('aborted'));
            return new Response(new ReadableStream({
                start(controller) { controller.enqueue(new TextEncoder().encode('begin')); },
                cancel() { console.log('cancelled'); },
            }));
        case '/throws':
            throw new Error('inside the handler');
        case '/nothing':
            return;
        case '/empty':
            return new Response(null, { status: 204 });
        default:
            return Response.json ? Response.json({ url: request.url, method: request.method, greeting: this.greeting })
                : new Response(JSON.stringify({ url: request.url, method: request.method, greeting: this.greeting }));
        }
    },
};
