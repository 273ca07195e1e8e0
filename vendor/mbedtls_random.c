/* Random bytes for Mbed TLS straight from the kernel: one generator, seeded by whoever
 * knows best, nothing to reseed after a fork or a restored snapshot. */
#include <errno.h>
#include <sys/random.h>

#include <psa/crypto.h>

psa_status_t mbedtls_psa_external_get_random(
    mbedtls_psa_external_random_context_t *unused, uint8_t *out, size_t size, size_t *got)
{
    (void) unused;
    for (*got = 0; *got < size;) {
        ssize_t n = getrandom(out + *got, size - *got, 0);
        if (n > 0)
            *got += (size_t) n;
        else if (n < 0 && errno != EINTR)
            return PSA_ERROR_INSUFFICIENT_ENTROPY;
    }
    return PSA_SUCCESS;
}
