"""The definition of the selective scan, written for reading: one position after another."""

import jax
import jax.numpy as jnp


def dense(v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU):
    """y [B, N, I] and the last state [B, I, U], float32; gradients keep the state of every
    position."""
    rates_IU = -jnp.exp(log_rates_IU)

    def one(state_BIU, position):
        v_BI, step_BI, in_BU, out_BU, reset_B = position
        decay_BIU = jnp.exp(step_BI[:, :, None] * rates_IU[None])
        decay_BIU = jnp.where(reset_B[:, None, None], 0, decay_BIU)
        state_BIU = decay_BIU * state_BIU + (step_BI * v_BI)[:, :, None] * in_BU[:, None]
        return state_BIU, (state_BIU * out_BU[:, None]).sum(axis=-1)

    arrays = (v_BNI, step_BNI, in_BNU, out_BNU, resets_BN)
    state_BIU, y_NBI = jax.lax.scan(one, state_BIU, tuple(jnp.swapaxes(x, 0, 1) for x in arrays))
    return jnp.swapaxes(y_NBI, 0, 1), state_BIU
