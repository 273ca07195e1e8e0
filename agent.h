/* agent.h - the contract between the agent and everything around it.
 *
 * Ports, paths, exit codes, frame layout and every limit stand here; behaviour stands in
 * agent.c. Nothing here is a variable or has a body. Sizes are bytes, times milliseconds
 * of CLOCK_MONOTONIC, unless a name says otherwise. */
#ifndef AGENT_H
#define AGENT_H

#include <stdint.h>

#define AGENT_VERSION   "0.1.0"

/* The version of the supervisor's wire that the ready message announces: with 2.0.0 the
 * host also sends IPv6 settings and SSH keys. */
#define ALEPH_VERSION   "2.0.0"

/* ---- Exit codes of the commands (init never exits) ------------------------------ */
#define EXIT_OK         0
#define EXIT_FAILED     1       /* the other side answered with an error, or could not be reached */
#define EXIT_USAGE      2       /* the command line or the configuration file makes no sense */

/* ---- Requests to halt, besides the host's on port 52 -------------------------------
 * Signals to PID 1; every other is ignored:
 *   reboot      SIGTERM (busybox reboot), SIGINT (ctrl-alt-del), 39 (systemd's SIGRTMIN+5)
 *   power off   SIGUSR2, SIGUSR1 (busybox poweroff, halt), SIGPWR, 38, 37 (SIGRTMIN+4, +3)
 * and the power button: power off. Where a machine cannot be switched off it is rebooted. */

/* ---- vsock ports (vsock(7)); the host is CID 2, VMADDR_CID_HOST ----------------- */
#define PORT_ALEPH      52      /* host to guest: instructions; guest to host: ready */
#define PORT_API        53      /* guest to host: the guest API, from PATH_API_SOCKET */
#define PORT_HTTP       80      /* host to guest: the program, plain HTTP/1.1 */
#define PORT_HTTPS      443     /* what a program is told of a client by TLS whose port is not known */

/* TCP, loopback of the guest: where a program listens that is no Python worker. */
#define PORT_PROGRAM    8080

/* ---- Paths in the guest ---------------------------------------------------------- */
#define PATH_OLD_ROOT   "/rom"                  /* the read-only root below the overlay */
#define PATH_CONF       "/etc/agent.json"       /* read at boot */
#define PATH_STATE      "/run/agent"            /* ours alone, 0755: the shim that Python runs */
#define PATH_CODE_ASGI  "/opt"                  /* where asgi code is unpacked */
#define PATH_CODE       "/opt/code"             /* where executables' code is unpacked or mounted */
#define CODE_DEVICE     "vdb"                   /* the disk that squashfs code comes on */
#define PATH_PACKAGES   "/opt/packages"         /* second on sys.path */
#define PATH_NODE_MODULES "/opt/node_modules"   /* second on NODE_PATH */
#define PATH_LOADING_PAGE "/root/loading.html"  /* the answer while a program does not listen yet */
#define PATH_DATA       "/data"                 /* where input_data is unpacked */
#define PATH_API_SOCKET "/tmp/socat-socket"     /* the guest API's address, as programs know it */
#define SSH_SERVER      "/usr/sbin/sshd"
#define SSH_KEYGEN      "/usr/bin/ssh-keygen"
#define PATH_CGROUP     "/sys/fs/cgroup"
#define PATH_PATH       "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define PATH_LIBS       "/opt/aleph/libs"       /* PYTHONPATH of every Python program */
#define PATH_NVM_HOME   "/root/.nvm"            /* where Node versions are, if NVM_DIR is not set: */
#define PATH_NVM_OPT    "/opt/nvm"              /* the first of these that is there */

/* ---- Frames between the agent and a Python worker ---------------------------------
 * A Unix stream socket, fd 3 of the worker. (Node's shim has the program's listening socket there, a
 * socket for FRAME_READY and FRAME_START_FAILED as fd 4, and one that listens for the agent as fd 5.)
 * Each frame is a header of 12 bytes, little endian, then the payload:
 *
 *     u32 length of the payload   u32 stream   u8 type   u8 flags   u16 zero
 *
 * Stream 0 is the worker itself. The agent numbers exchanges from 1 upward; each is
 * opened by FRAME_REQUEST and closed by the worker with exactly one of
 * FRAME_RESPONSE_BODY or _SLOT + FRAME_END or FRAME_FAILURE, also after FRAME_DISCONNECT, which
 * the worker answers at once. A frame for a stream that is not open is a protocol error.
 * A WebSocket is a FRAME_REQUEST whose scope says so; FRAME_RESPONSE_HEAD with 101 accepts it,
 * any other status is the answer to a client that is not let in.
 *
 * Flow control: a sender may have WORKER_CREDIT body bytes under way per stream and
 * direction; the receiver gives more with FRAME_WINDOW (u32 bytes) as it consumes.
 *
 * Long bodies of responses need not go through the socket. fd 4 of a Python worker is memory that
 * both see: WORKER_SLOTS flags of a byte, then from WORKER_SLOTS_AT on as many slots. The worker sets
 * a flag that is clear, fills the slot and says so in FRAME_RESPONSE_SLOT; the agent clears the flag
 * once it has handed the bytes on. */
#define FRAME_HEADER_BYTES  12

enum frame_type {
    /* agent to worker */
    FRAME_CONFIGURE      = 1,   /* stream 0: marshal v2 dict, see worker.py */
    FRAME_REQUEST        = 2,   /* marshal v2 tuple: type, http_version, method, scheme, path, raw_path, query_string,
                                 * client, server and headers of the ASGI scope; aleph.message: type, body.
                                 * END: no body follows */
    FRAME_REQUEST_BODY   = 3,   /* body bytes; END: the last, may be empty */
    FRAME_DISCONNECT     = 4,   /* empty: nobody waits for the answer any more; an accepted WebSocket: as CLOSE */
    FRAME_SHUTDOWN       = 5,   /* stream 0, empty: lifespan shutdown, then exit 0 */
    /* both */
    FRAME_WINDOW         = 6,   /* u32: that many more body bytes may come */
    /* worker to agent */
    FRAME_HELLO          = 7,   /* stream 0, empty: the interpreter runs, configure me */
    FRAME_READY          = 8,   /* stream 0, empty: the program is loaded, lifespan started */
    FRAME_START_FAILED   = 9,   /* stream 0: message NUL traceback; the worker exits after */
    FRAME_RESPONSE_HEAD  = 10,  /* u16 status, u16 n, then n times name NUL value NUL */
    FRAME_RESPONSE_BODY  = 11,  /* body bytes; END: the response is complete */
    FRAME_RESPONSE_SLOT  = 16,  /* u32 slot, u32 bytes: FRAME_RESPONSE_BODY of what lies there */
    FRAME_FAILURE        = 12,  /* message NUL traceback: the program raised before the end */
    FRAME_CLOSE          = 15,  /* u16 code, reason: the program ends a WebSocket, and with it the stream */
    /* both */
    FRAME_TEXT           = 13,  /* piece of a WebSocket's message; END: its last. It takes its length */
    FRAME_BINARY         = 14,  /* and FRAME_HEADER_BYTES of the credit */
};

#define FRAME_END           0x01    /* flag: last frame of its direction */

/* ---- Limits -----------------------------------------------------------------------
 * X(name, default, least, most, what it bounds). Each can be set with
 * agent.limit.NAME=VALUE on the kernel command line or `init --limit NAME=VALUE`. */
#define LIMITS(X) \
    /* sizes */ \
    X(conf_bytes,         32 << 20,   1 << 10, 1 << 30, "configuration on port 52") \
    X(body_bytes,         16 << 20,   1 << 10, 1 << 30, "request body on port 52") \
    X(reply_bytes,        64 << 20,   1 << 10, 1 << 30, "reply on port 52, output data included; a quarter of RAM if that is less") \
    X(http_body_bytes,    INT64_MAX,  1,     INT64_MAX, "request body on port 80") \
    X(http_head_bytes,    64 << 10,   1 << 10, 1 << 20, "request head: request line and fields") \
    X(http_target_bytes,  16 << 10,   256,     1 << 20, "request target") \
    X(http_chunk_ext_bytes, 4 << 10,  0,       1 << 20, "chunk extensions and trailers of one request") \
    X(websocket_message_bytes, 17 << 20, 1,   INT64_C(1) << 30, "message of a WebSocket's client") \
    X(head_fields,        256,        8,       4096,    "fields of one head, either way") \
    X(head_bytes,         64 << 10,   1 << 10, 1 << 20, "head of one response") \
    X(command_bytes,      64 << 10,   256,     1 << 20, "text of one !command") \
    X(command_out_bytes,  64 << 20,   1 << 10, INT64_MAX, "output of one !command") \
    X(mp_depth,           64,         4,       64,      "nesting of msgpack") \
    X(variables,          1024,       1,       65536,   "environment variables in a configuration") \
    X(dns_servers,        3,          1,       3,       "name servers kept (resolv.conf(5), MAXNS)") \
    X(zip_entries,        200000,     1,       1 << 24, "entries of one archive") \
    X(zip_bytes,          INT64_C(2) << 30, 1 << 10, INT64_C(1) << 40, "bytes that one archive unpacks to") \
    X(zip_ratio,          200,        2,       2000,    "unpacked to packed, past the first 16 MiB") \
    X(zip_depth,          64,         2,       256,     "folders inside folders") \
    X(error_bytes,        16 << 10,   1 << 10, 24 << 10, "traceback and output tail in an error reply, each") \
    X(log_line_bytes,     1 << 10,    64,      4 << 10, "one line of a program's output") \
    X(log_ring_bytes,     64 << 10,   4 << 10, 16 << 20, "log kept in memory") \
    /* counts */ \
    X(conns,              16384,      16,      1 << 20, "connections open at once, all fronts") \
    X(api_conns,          256,        1,       16384,   "connections to the guest API at once; more wait") \
    X(commands,           16,         1,       256,     "!commands at once") \
    X(queue,              1024,       1,       65536,   "requests that wait for the program; past it 503 and Retry-After") \
    X(reload_folders,     8192,       1,       1 << 20, "folders that --reload watches") \
    X(in_flight,          16384,      1,       1 << 20, "requests that one process of the program has at once") \
    X(overlay_percent,    50,         1,       95,      "part of RAM that the overlay may fill") \
    X(program_memory_percent, 95,     1,       100,     "part of the memory available at boot that the program may use") \
    X(program_pids_percent, 75,       1,       100,     "part of the kernel's processes and threads that the program may start") \
    /* times */ \
    X(silent_ms,          30000,      100,     3600000, "a connection's first byte, its TLS handshake before that") \
    X(head_ms,            30000,      100,     3600000, "the rest of a request head or instruction") \
    X(idle_ms,            75000,      100,     3600000, "between requests of one connection") \
    X(body_ms,            60000,      100,     3600000, "silence inside a request body") \
    X(send_ms,            60000,      100,     3600000, "a client that does not read its response") \
    X(websocket_ping_ms,  20000,      10,     3600000, "silence of a WebSocket's client: it is pinged, then closed") \
    X(response_head_ms,   300000,     100,     3600000, "the program's response head") \
    X(start_ms,           50000,      100,     3600000, "the program's start; the host gives a configuration 60 s") \
    X(exec_wait_ms,       1000,       10,      3600000, "an executable that has run for so long counts as started") \
    X(loading_ms,         90000,      100,     3600000, "a started executable that does not listen yet; then 503") \
    X(upstream_idle_ms,   4000,       10,      3600000, "an idle connection to the program; Node closes after 5 s") \
    X(lifespan_ms,        30000,      100,     3600000, "lifespan startup") \
    X(command_ms,         60000,      100,     86400000, "one !command") \
    X(command_gap_ms,     50,         1,       10000,   "silence that ends a !command's text") \
    X(grace_ms,           3000,       0,       60000,   "from SIGTERM to SIGKILL") \
    X(halt_ms,            4000,       100,     60000,   "halt in all; the host gives 5 s") \
    X(linger_ms,          1000,       0,       60000,   "reading on after an early error, so that it arrives") \
    X(device_ms,          1000,       0,       60000,   "a volume's device to appear") \
    X(data_ms,            10000,      10,      3600000, "looking through /data and packing it for a reply") \
    X(api_wait_ms,        30000,      0,       3600000, "the host's end of the guest API to take a connection") \
    X(api_idle_ms,        300000,     100,     86400000, "silence of a connection to the guest API") \
    X(ready_retry_ms,     20,         1,       10000,   "between two tries to say ready") \
    X(reload_ms,          200,        1,       60000,   "silence after a change, then --reload starts the program anew") \
    X(backoff_ms,         100,        1,       60000,   "first wait before a restart; doubles") \
    X(backoff_max_ms,     10000,      1,       600000,  "longest wait before a restart")

/* Not to be set: sizes of our own buffers and what the wire fixes. */
#define TLS_FILE_MAX        (1 << 20)       /* a file of certificates or a key */
#define TLS_CA_LIST_MAX     4096            /* names of authorities that clients are told of */
#define TLS_SUBJECT_MAX     1024            /* a client's subject in a field */
#define TLS_SEED_MS         500             /* between two looks whether the kernel has random bytes */
#define TLS_STEPS_PER_TURN  4               /* of handshakes: with an RSA key of 2048 bits one takes 6 ms */
#define WORKER_CREDIT       (192 << 10)     /* body bytes under way per stream and direction */
#define WORKER_FRAME_MAX    (256 << 10)     /* payload of one frame from a worker */
#define WORKER_READ_BYTES   (128 << 10)     /* one read from a worker */
#define WORKER_SOCKET_BYTES (512 << 10)     /* under way to and from it; the kernel's own limit may be less */
#define WORKER_SLOTS        32              /* long bodies under way; more go through the socket */
#define WORKER_SLOT_BYTES   WORKER_CREDIT
#define WORKER_SLOTS_AT     4096            /* a page of flags, of which the first ones count */
#define CONF_PREFIX_MAX     9               /* digits of the configuration's length */
#define CONN_READ_BYTES     (64 << 10)      /* one read, and room kept in an input buffer */
#define CONN_GREETING_MAX   64              /* the answer to CONNECT on a hybrid socket */
#define CONN_OUT_HIGH       (128 << 10)     /* past this a client is slow: the program waits */
#define ALEPH_TAIL_BYTES    64              /* room for a reply's last keys, without their values */
#define SSH_KEY_MAX         16384           /* bytes of one SSH key */
#define API_RETRY_MS        20              /* between two tries of the guest API, when few wait */
#define NODE_FILE_MAX       (256 << 10)     /* .nvmrc and package.json, each */
#define NODE_PIN_MAX        255             /* characters of the version that a program asks for */
#define NODE_PART_MAX       999999          /* each of the three numbers of a version */
#define NODE_LTS_MAX        100             /* majors that may have long-term support are below */
#define NODE_VERSIONS_MAX   1024            /* installed versions that are looked at */
#define NODE_LIST_MAX       400             /* characters of them in an error, about */
#define LOADING_PAGE_MAX    (256 << 10)     /* the loading page */
#define ENTRYPOINT_MAX      512             /* the entrypoint, with its arguments */
#define HOSTNAME_MAX        63              /* one DNS label */
#define HOSTS_BYTES_MAX     (1 << 20)       /* of /etc/hosts; a longer one is left alone */
#define VOLUME_DEVICE_MAX   31              /* bytes of a volume's device name (BDEVNAME_SIZE) */
#define VOLUME_MOUNT_MAX    1023            /* bytes of the path where it is mounted */
#define VOLUME_MOUNTS_MAX   1024            /* mounts of anybody that halt detaches */
#define CONF_FILE_MAX       (1 << 20)       /* a configuration file */
#define LISTEN_MAX          16              /* addresses for HTTP */
#define WORKERS_MAX         128             /* processes of one program */

#endif
