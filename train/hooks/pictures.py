"""Pictures of predictions at each validation."""


from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Pictures(Hook):
    """stub"""
