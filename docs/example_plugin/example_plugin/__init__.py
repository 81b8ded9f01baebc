"""An example plugin: this module is light, and its hook imports the rest when it is asked."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components():
    from example_plugin.components import FusedAgreement, MaxPooling

    return [MaxPooling, FusedAgreement]
