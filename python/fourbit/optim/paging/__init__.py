"""Paging of optimizer state: what lets a run outlive a moment at which the card is full.

============  ==================================================================================
`placement`   the pagers of an optimizer, one for each device
`pager`       what a pager does, and which one a device gets
`unified`     the pager of managed memory
`pinned`      the pager of page-locked memory
`paged`       what these two have in common
`resident`    the pager that moves nothing
`round`       one step's launches, and the copies beside them
`schedule`    in what order pages come, are stepped and leave: arithmetic
`pages`       which moments lie in which page
`card`        what all of them ask of a card
`report`      counters
============  ==================================================================================
"""

from fourbit.optim.paging.pager import PagerName
from fourbit.optim.paging.placement import Placement
from fourbit.optim.paging.report import PagingReport

__all__ = ["PagerName", "PagingReport", "Placement"]
