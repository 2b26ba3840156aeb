// Two simulated cards with memory of their own, as torch's PrivateUse1 backend.
//
// Memory is real host memory behind an allocator that behaves like a card's: it has a capacity, rounds requests, keeps
// freed blocks in a pool, counts live, peak and reserved bytes, and raises torch.OutOfMemoryError. Computation falls back
// to the CPU: only what decides where bytes lie is written here.

#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr int kCards = 2;
constexpr size_t kRoundBytes = 512;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// A piece of memory taken from the "driver". It goes back as a whole, when none of it is in use.
struct Segment {
  char* base;
  size_t size;
  int card;
  bool shared;                        // holds several small blocks, and so can be pinned down by one of them
  std::map<size_t, size_t> free_parts;  // offset -> size, neighbours merged

  bool unused() const {
    return free_parts.size() == 1 && free_parts.begin()->second == size;
  }
};

struct Block {
  std::list<Segment>::iterator segment;
  size_t offset, size;
};

struct Card {
  int64_t capacity = int64_t{8} << 30;
  int64_t context = 0;        // taken at the first allocation, and never given back
  int64_t shared_segment = 0;  // > 0: blocks up to half of this share segments of this size (fragmentation)
  bool started = false;
  int64_t live = 0, peak = 0, reserved = 0, allocations = 0, failures = 0;
  int64_t copied_in = 0, copied_out = 0;
  std::list<Segment> segments;

  int64_t context_now() const {
    return started ? context : 0;
  }
};

std::mutex mutex;
Card cards[kCards];
std::unordered_map<void*, Block> blocks;
thread_local c10::DeviceIndex current = 0;

Card& card_at(int64_t index) {
  TORCH_CHECK(index >= 0 && index < kCards, "simcard: expected a card of 0 to ", kCards - 1, "; got ", index);
  return cards[index];
}

void give_back_unused(Card& card) {
  for (auto it = card.segments.begin(); it != card.segments.end();) {
    if (it->unused()) {
      card.reserved -= static_cast<int64_t>(it->size);
      std::free(it->base);
      it = card.segments.erase(it);
    } else {
      ++it;
    }
  }
}

void* take(std::list<Segment>::iterator segment, std::map<size_t, size_t>::iterator part, size_t size) {
  const auto [offset, available] = *part;
  const size_t taken = segment->shared ? size : available;
  segment->free_parts.erase(part);
  if (available > taken) segment->free_parts.emplace(offset + taken, available - taken);
  void* pointer = segment->base + offset;
  blocks[pointer] = {segment, offset, taken};
  return pointer;
}

// A block from the pool, or nullptr. As on a card, a whole cached block serves a request that is not much smaller.
void* from_pool(Card& card, size_t size, bool shared) {
  for (auto segment = card.segments.begin(); segment != card.segments.end(); ++segment) {
    if (segment->shared != shared) continue;
    for (auto part = segment->free_parts.begin(); part != segment->free_parts.end(); ++part) {
      const bool fits = part->second >= size && (shared || part->second <= size + size / 4);
      if (fits) return take(segment, part, size);
    }
  }
  return nullptr;
}

void* from_driver(Card& card, int index, size_t size, bool shared) {
  const size_t wanted = shared ? static_cast<size_t>(card.shared_segment) : size;
  auto fits = [&] { return card.reserved + card.context_now() + static_cast<int64_t>(wanted) <= card.capacity; };
  if (!fits()) give_back_unused(card);
  void* base = nullptr;
  if (!fits() || posix_memalign(&base, 64, wanted) != 0) return nullptr;
  card.reserved += static_cast<int64_t>(wanted);
  card.segments.push_front({static_cast<char*>(base), wanted, index, shared, {{0, wanted}}});
  return take(card.segments.begin(), card.segments.front().free_parts.begin(), size);
}

void release(void* pointer) {
  if (pointer == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = blocks.find(pointer);
  if (found == blocks.end()) return;
  auto [segment, offset, size] = found->second;
  blocks.erase(found);
  cards[segment->card].live -= static_cast<int64_t>(size);
  auto& parts = segment->free_parts;
  auto at = parts.emplace(offset, size).first;
  if (const auto next = std::next(at); next != parts.end() && at->first + at->second == next->first) {
    at->second += next->second;
    parts.erase(next);
  }
  if (at != parts.begin()) {
    if (const auto before = std::prev(at); before->first + before->second == at->first) {
      before->second += at->second;
      parts.erase(at);
    }
  }
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kDevice, current);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    const size_t size = (bytes + kRoundBytes - 1) / kRoundBytes * kRoundBytes;
    void* pointer = nullptr;
    int64_t live = 0, reserved = 0, capacity = 0;
    {
      std::lock_guard<std::mutex> lock(mutex);
      Card& card = cards[current];
      card.started = true;
      const bool shared = static_cast<int64_t>(size) <= card.shared_segment / 2;
      pointer = from_pool(card, size, shared);
      if (pointer == nullptr) pointer = from_driver(card, current, size, shared);
      if (pointer == nullptr) {
        ++card.failures;
      } else {
        ++card.allocations;
        card.live += static_cast<int64_t>(blocks[pointer].size);
        card.peak = std::max(card.peak, card.live);
      }
      live = card.live, reserved = card.reserved, capacity = card.capacity;
    }
    TORCH_CHECK_WITH(OutOfMemoryError, pointer, "simcard:", int{current}, " out of memory: tried to allocate ", size,
                     " bytes; ", live, " live and ", reserved, " reserved of ", capacity, ".");
    return {pointer, pointer, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

CardAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// There is one stream, and nothing runs behind the caller's back.
struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kDevice;
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(kDevice, current);
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kDevice, current}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.has_index() ? device.index() : 0; }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kCards; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, CardGuard);

// The same bytes seen as a CPU tensor. Only for the length of one operator: it does not own them.
at::Tensor on_host(const at::Tensor& tensor) {
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .options(tensor.options().device(at::kCPU))
      .make_tensor();
}

at::Tensor empty_memory_format(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>,
                               std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

void count_copy(const at::Tensor& from, const at::Tensor& to) {
  std::lock_guard<std::mutex> lock(mutex);
  if (from.is_cpu()) cards[to.device().index()].copied_in += static_cast<int64_t>(to.nbytes());
  if (to.is_cpu()) cards[from.device().index()].copied_out += static_cast<int64_t>(from.nbytes());
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (to.numel() > 0) {
    count_copy(from, to);
    at::Tensor target = to.is_cpu() ? to : on_host(to);
    target.copy_(from.is_cpu() ? from : on_host(from));
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t needed = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  c10::Storage storage = impl->unsafe_storage();
  if (needed > storage.nbytes()) {
    const c10::DeviceGuard guard(tensor.device());
    c10::DataPtr grown = allocator.allocate(needed);
    if (storage.nbytes() > 0) std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(needed);
  }
  return tensor;
}

// cpu_fallback cannot return views: those that torch asks of a backend are made here.
at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           start);
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::native::set_storage_meta__symint(tensor, storage, offset, size, stride);
}

at::Scalar item(const at::Tensor& tensor) {
  return on_host(tensor).item();
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<at::Tensor> added;
  if (bias && bias->defined()) added = on_host(*bias);
  const at::Tensor result = at::convolution(
      on_host(input), on_host(weight), added, C10_AS_INTARRAYREF_SLOW(stride), C10_AS_INTARRAYREF_SLOW(padding),
      C10_AS_INTARRAYREF_SLOW(dilation), transposed, C10_AS_INTARRAYREF_SLOW(output_padding),
      groups.guard_int(__FILE__, __LINE__));
  return result.to(input.device());
}

void computed_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&computed_on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty_memory_format);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("resize_", resize);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("_local_scalar_dense", item);
  library.impl("convolution_overrideable", convolution);
}

// Read under the lock, turned into a dict after it: making Python objects may start a collection, which may free a
// tensor, which takes the lock.
std::map<std::string, int64_t> read(int64_t index) {
  std::lock_guard<std::mutex> lock(mutex);
  const Card& card = card_at(index);
  int64_t stuck = 0;  // free, but in a segment that something else still uses
  for (const Segment& segment : card.segments) {
    if (segment.unused()) continue;
    for (const auto& [offset, size] : segment.free_parts) stuck += static_cast<int64_t>(size);
  }
  return {{"live", card.live},         {"peak", card.peak},
          {"reserved", card.reserved}, {"inactive_split", stuck},
          {"context", card.context_now()}, {"capacity", card.capacity},
          {"allocations", card.allocations}, {"failures", card.failures},
          {"copied_in", card.copied_in}, {"copied_out", card.copied_out}};
}

pybind11::dict statistics(int64_t index) {
  pybind11::dict found;
  for (const auto& [name, value] : read(index)) found[name.c_str()] = value;
  return found;
}

void set_up(int64_t index, int64_t capacity, int64_t context, int64_t shared_segment) {
  std::lock_guard<std::mutex> lock(mutex);
  Card& card = card_at(index);
  give_back_unused(card);
  card.capacity = capacity;
  card.context = context;
  card.shared_segment = shared_segment;
}

void reset_peak(int64_t index) {
  std::lock_guard<std::mutex> lock(mutex);
  card_at(index).peak = card_at(index).live;
}

void empty_cache() {
  std::lock_guard<std::mutex> lock(mutex);
  for (Card& card : cards) give_back_unused(card);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("statistics", &statistics);
  module.def("set_up", &set_up);
  module.def("reset_peak", &reset_peak);
  module.def("empty_cache", &empty_cache);
  module.def("set_device", [](int64_t index) { card_at(index), current = static_cast<c10::DeviceIndex>(index); });
  module.def("current_device", [] { return int{current}; });
}
