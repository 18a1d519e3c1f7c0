"""What a forecast leaves in memory: nothing."""

import gc

from torch import nn

from graphopt.cost import forecast


def test_what_a_forecast_copies_goes_without_the_cyclic_collector():
    class Own(nn.Linear):
        """Told from the modules of other tests."""

    module = nn.Sequential(Own(4, 4), nn.ReLU())
    gc.collect()
    gc.disable()
    try:
        forecast(module, (4,), 2)
        assert [one for one in gc.get_objects() if type(one) is Own] == [module[0]]
    finally:
        gc.enable()
