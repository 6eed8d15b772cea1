# SPDX-License-Identifier: Apache-2.0
"""Stores on other machines: Redis, HTTP servers, object stores and OCI registries, as levels of a stack.

:func:`open_tier` opens a tier from its settings. Neither that nor a local hit imports a client or opens a connection.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.base import ProgramCacheResource
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.signing import Signer, Verifier


def open_tier(settings: TierSettings) -> ProgramCacheResource:
    """A store on a tier.

    Parameters
    ----------
    settings : TierSettings

    Returns
    -------
    ProgramCacheResource
        A read-only one for mode ``ro``.

    Raises
    ------
    StoreError
        The directory doesn't exist (``file:``).
    """
    from cuda_progcache.store.readonly import ReadOnlyProgramCache

    if settings.scheme == "file" and settings.trust == "anyone":
        return ReadOnlyProgramCache(settings.path, shared=True)
    from cuda_progcache.store.tiers.on_demand import EngineOnDemand
    from cuda_progcache.store.tiers.remote import RemoteProgramCache

    verifier: Verifier | None = None
    signer: Signer | None = None
    voucher: Verifier | None = None
    if settings.trust == "signed" or settings.sign_key is not None:
        from cuda_progcache.store.tiers import signing

        verifier = signing.Verifier(settings.keys) if settings.trust == "signed" else None
        if settings.sign_key is not None:
            signer = signing.Signer(settings.sign_key)
            voucher = signing.Verifier(settings.keys, signer)
    remote = RemoteProgramCache(EngineOnDemand(settings), settings, verifier=verifier, signer=signer, voucher=voucher)
    return ReadOnlyProgramCache(remote) if settings.mode == "ro" else remote
