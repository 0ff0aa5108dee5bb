"""DeiT-S with ATS at its fourth block and all later ones, which the paper fine-tunes or takes as trained."""

from mmengine.config import read_base

with read_base():
    from .deit_small_imagenet_300e import *

model['backbone'].update(reduction=dict(type='ats'))

# published: about 79.7 top-1 at 2.9 GFLOPs (from memory); not trained here
