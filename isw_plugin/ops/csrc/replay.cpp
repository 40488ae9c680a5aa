// Does again what a call of a graph did, without Python between its operators: a layer of a small network takes less
// than reading its arguments. Python describes the class in replay.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "threads.h"

namespace {

using at::Tensor;
using c10::IValue;
using Slot = int64_t;
constexpr Slot none = -1;

// A value, or what an earlier call made: one tensor, or some of a list.
struct Argument {
  IValue value;
  Slot slot = none;
  std::vector<Slot> elements;

  bool depends() const { return slot != none || !elements.empty(); }

  IValue filled(const std::vector<Tensor>& slots) const {
    if (slot != none) return slots[slot];
    if (elements.empty()) return value;
    c10::impl::GenericList list = value.toList().copy();
    for (size_t i = 0; i < elements.size(); ++i)
      if (elements[i] != none) list.set(i, slots[elements[i]]);
    return list;
  }
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<std::vector<Slot>> results;  // by return value: one slot of a tensor, several of a list
  std::vector<Slot> finished;              // slots that no later call reads
};

class Tape : public torch::CustomClassHolder {
 public:
  // Calls of this thread's operators are written down from now on. False: they go onto another tape.
  static bool start(const c10::intrusive_ptr<Tape>& tape, const std::vector<Tensor>& inputs) {
    TORCH_CHECK(tape->state_ == State::fresh, "a tape is recorded once");
    if (recording && !abandoned()) return false;
    end();
    tape->state_ = State::recording;
    for (const Tensor& input : inputs) tape->new_slot(input);
    tape->inputs_ = inputs.size();
    recording = tape;
    tape->handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&Tape::enter, &Tape::leave).needsInputs(true).needsOutputs(true).scopes(
            {at::RecordScope::FUNCTION}));
    return true;
  }

  // Until now; these are what a run gives. False: something was called that cannot be called again, or this tape was
  // not being recorded.
  bool stop(const std::vector<Tensor>& outputs) {
    if (recording.get() != this) return false;
    end();
    state_ = State::recorded;
    for (const Tensor& output : outputs) outputs_.push_back(argument_of(output));
    find_finished();
    known_.clear();
    held_.clear();
    return complete_;
  }

  std::vector<Tensor> run(std::vector<Tensor> inputs) const {
    TORCH_CHECK(state_ == State::recorded, "nothing was recorded on this tape");
    TORCH_CHECK_VALUE(inputs.size() == inputs_, "expected ", inputs_, " tensors, got ", inputs.size());
    const at::AutoDispatchBelowAutograd no_gradients;
    std::vector<Tensor> slots = std::move(inputs);
    slots.resize(count_);
    const auto run_calls = [&] { run(calls_, slots); };
    if (own_work_ > 16 * other_work_) isw::with_team(run_calls);  // where PyTorch's share is small
    else run_calls();
    std::vector<Tensor> outputs;
    for (const Argument& output : outputs_) outputs.push_back(output.filled(slots).toTensor());
    return outputs;
  }

 private:
  enum class State { fresh, recording, recorded };

  static void run(const std::vector<Call>& calls, std::vector<Tensor>& slots) {
    torch::jit::Stack stack;
    for (const Call& call : calls) {
      stack.clear();
      for (const Argument& argument : call.arguments) stack.push_back(argument.filled(slots));
      call.op.callBoxed(&stack);
      for (size_t i = 0; i < call.results.size(); ++i) store(stack[i], call.results[i], slots);
      for (const Slot slot : call.finished) slots[slot] = Tensor();
    }
  }

  // Held here too: a call that was interrupted may drop its tape before it stops it.
  static thread_local c10::intrusive_ptr<Tape> recording;

  static bool abandoned() { return recording.use_count() == 1; }

  static void end() {
    if (recording) at::removeCallback(recording->handle_);
    recording.reset();
  }

  // Operators call others; only what the graph itself called counts.
  static std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& function) {
    Tape& tape = *recording;
    if (tape.depth_++ > 0 || abandoned()) return nullptr;
    tape.current_.clear();
    for (const IValue& input : function.inputs()) tape.current_.push_back(tape.argument_of(input));
    return nullptr;
  }

  static void leave(const at::RecordFunction& function, at::ObserverContext*) {
    Tape& tape = *recording;
    if (--tape.depth_ > 0) return;
    const auto name = function.operator_name();
    const auto op = name ? c10::Dispatcher::singleton().findSchema(*name) : std::nullopt;
    if (!op || function.outputs().size() != op->schema().returns().size()) {  // the latter: it raised
      tape.complete_ = false;
      return;
    }
    tape.add({*op, std::move(tape.current_), {}, {}}, function.outputs());
  }

  // What depends on no input is a constant, as it was made, in part perhaps by other means than operators.
  void add(Call call, const std::vector<IValue>& outputs) {
    const auto& schema = call.op.schema();
    bool depends = false;
    for (const Argument& argument : call.arguments) depends = depends || argument.depends();
    if (!depends) {
      complete_ = complete_ && !call.op.hasTag(at::Tag::nondeterministic_seeded);
      return;
    }
    for (size_t i = 0; i < call.arguments.size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias && alias->isWrite() && !call.arguments[i].depends()) complete_ = false;  // it would be written again
    }
    for (const IValue& output : outputs) call.results.push_back(slots_of(output));
    (schema.name().starts_with("isw::") ? own_work_ : other_work_) += work_of(call, outputs);
    calls_.push_back(std::move(call));
  }

  // About the multiply-adds of a call: for every number that it makes those of a matrix of constants, or a few for its
  // way through memory.
  static int64_t work_of(const Call& call, const std::vector<IValue>& outputs) {
    int64_t made = 0, each = 8;
    for (const IValue& output : outputs)
      if (output.isTensor() && output.toTensor().defined()) made += output.toTensor().numel();
    for (const Argument& argument : call.arguments) {
      const Tensor weight = argument.value.isTensor() ? argument.value.toTensor() : Tensor();
      if (!weight.defined() || weight.dim() < 2 || weight.numel() == 0) continue;
      const int64_t block = weight.dim() == 5 ? weight.size(4) : 1;  // of packed weights
      each = std::max(each, weight.numel() / weight.size(0) / block);
    }
    return made * each;
  }

  static void store(const IValue& value, const std::vector<Slot>& results, std::vector<Tensor>& slots) {
    if (value.isTensor()) {
      if (!results.empty()) slots[results[0]] = value.toTensor();
      return;
    }
    for (size_t i = 0; i < results.size(); ++i) slots[results[i]] = value.toListRef()[i].toTensor();
  }

  Argument argument_of(const IValue& value) const {
    Argument argument;
    if (value.isTensor()) {
      argument.slot = find(value.toTensor());
    } else if (value.isList()) {
      c10::impl::GenericList list = value.toList().copy();
      std::vector<Slot> elements;
      bool any = false;
      for (size_t i = 0; i < list.size(); ++i) {
        const IValue element = list.get(i);
        elements.push_back(element.isTensor() ? find(element.toTensor()) : none);
        if (elements.back() == none) continue;
        any = true;
        list.set(i, Tensor());  // or the tape would hold the first call's maps
      }
      if (any) return {list, none, elements};
    }
    if (argument.slot == none) argument.value = value;
    return argument;
  }

  Slot find(const Tensor& tensor) const {
    const auto found = known_.find(tensor.unsafeGetTensorImpl());
    return found == known_.end() ? none : found->second;
  }

  std::vector<Slot> slots_of(const IValue& value) {
    std::vector<Slot> slots;
    if (value.isTensor() && value.toTensor().defined()) slots.push_back(new_slot(value.toTensor()));
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) slots.push_back(new_slot(tensor));
    return slots;
  }

  // What an operator gives back may be what it took.
  Slot new_slot(const Tensor& tensor) {
    const auto [place, is_new] = known_.emplace(tensor.unsafeGetTensorImpl(), count_);
    if (is_new) {
      ++count_;
      held_.emplace_back(tensor.getIntrusivePtr());  // weakly: its address stays its own, its memory is freed
    }
    return place->second;
  }

  void find_finished() {
    std::vector<bool> needed(count_, false);
    const auto read = [&](const Argument& argument, std::vector<Slot>* finished) {
      const auto one = [&](Slot slot) {
        if (slot == none || needed[slot]) return;
        needed[slot] = true;
        if (finished) finished->push_back(slot);
      };
      one(argument.slot);
      for (const Slot slot : argument.elements) one(slot);
    };
    for (const Argument& output : outputs_) read(output, nullptr);
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      for (const auto& slots : call->results)
        for (const Slot slot : slots)
          if (!needed[slot]) call->finished.push_back(slot);  // an output that nobody reads
      for (const Argument& argument : call->arguments) read(argument, &call->finished);
    }
  }

  State state_ = State::fresh;
  size_t inputs_ = 0;
  Slot count_ = 0;
  std::vector<Call> calls_;
  std::vector<Argument> outputs_;
  int64_t own_work_ = 0, other_work_ = 0;
  // While it is recorded:
  std::unordered_map<c10::TensorImpl*, Slot> known_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> held_;
  std::vector<Argument> current_;
  int64_t depth_ = 0;
  bool complete_ = true;
  at::CallbackHandle handle_ = 0;
};

thread_local c10::intrusive_ptr<Tape> Tape::recording;

TORCH_LIBRARY_FRAGMENT(isw, library) {
  if (torch::getCustomClass("__torch__.torch.classes.isw.Tape")) return;  // another copy of this library has it
  library.class_<Tape>("Tape")
      .def(torch::init<>())
      .def("start", [](const c10::intrusive_ptr<Tape>& self, std::vector<Tensor> inputs) { return Tape::start(self, inputs); })
      .def("stop", [](const c10::intrusive_ptr<Tape>& self, std::vector<Tensor> outputs) { return self->stop(outputs); })
      .def("run", [](const c10::intrusive_ptr<Tape>& self, std::vector<Tensor> inputs) { return self->run(std::move(inputs)); });
}

}  // namespace
