"""Every private torch name that this package uses, wrapped; nothing else in the package touches one.

Checked on torch 2.11.0 (CUDA 13.0 and CPU) and on 2.13.0, 2.14.1 and 2.15.0 (CPU), unless a line says otherwise: all names are at
the same place on these.

What ``import torch`` leaves out is imported where it is needed: Dynamo, AOTAutograd, Inductor and symbols take longer to
import than all else together, and a program that marks its functions may never compile them.

All names of the modules are names of the package: callers say ``_torch.name``, wherever in it the name is.
"""

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from breakable_backend._torch.aot import *
from breakable_backend._torch.as_python import *
from breakable_backend._torch.asking import *
from breakable_backend._torch.autograd import *
from breakable_backend._torch.compiled_functions import *
from breakable_backend._torch.cuda import *
from breakable_backend._torch.dynamo import *
from breakable_backend._torch.exceptions import *
from breakable_backend._torch.frames import *
from breakable_backend._torch.graphs import *
from breakable_backend._torch.modes import *
from breakable_backend._torch.module_calls import *
from breakable_backend._torch.observing import *
from breakable_backend._torch.ops import *
from breakable_backend._torch.symbols import *
from breakable_backend._torch.tensors import *
