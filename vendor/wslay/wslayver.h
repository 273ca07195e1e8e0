/* What wslay's configure would write. */
#define WSLAY_VERSION "1.1.1"
