/* An expert put into its slot by one call (offmoe.h), in the calling thread, which is a reader's.
 *
 * What moves: what retile.c and tile.c move. The steps are the same for all experts of a layer, so they hold offsets in
 * place of addresses.
 */
#include "offmoe.h"

/* A plane that a format lacks has offset 0, and is never used. */
#define PLANE(r, slot, plane) (r).plane = (void *)((slot) + (uintptr_t)(r).plane)

/* Runs in the calling thread. The caller has checked sizes and memory. */
EXPORT void offmoe_place(const struct placing *steps, int count, uint8_t *slot, const uint8_t *const *tensors) {
    for (const struct placing *step = steps; step < steps + count; step++) {
        const uint8_t *from = tensors[step->tensor];
        if (step->has_blocks) {
            struct retiling r = step->blocks;
            r.blocks = from + (uintptr_t)r.blocks;
            PLANE(r, slot, words);
            PLANE(r, slot, scales);
            PLANE(r, slot, minima);
            PLANE(r, slot, high);
            PLANE(r, slot, supers);
            offmoe_retile(&r);
        } else {
            struct tiling t = step->rows;
            t.rows = from + (uintptr_t)t.rows;
            PLANE(t, slot, tiles);
            offmoe_tile(&t);
        }
    }
}
