/* Random bytes for Mbed TLS straight from the kernel: one generator, seeded by whoever
 * knows best, nothing to reseed after a fork or a restored snapshot. Early in a boot it may have
 * none yet: then a handshake fails, and nothing waits. */
#include <errno.h>
#include <sys/random.h>

#include <psa/crypto.h>

psa_status_t mbedtls_psa_external_get_random(
    mbedtls_psa_external_random_context_t *unused, uint8_t *out, size_t size, size_t *got)
{
    (void) unused;
    for (*got = 0; *got < size;) {
        ssize_t n = getrandom(out + *got, size - *got, GRND_NONBLOCK);
        if (n > 0)
            *got += (size_t) n;
        else if (n < 0 && errno != EINTR)
            return PSA_ERROR_INSUFFICIENT_ENTROPY;
    }
    return PSA_SUCCESS;
}
