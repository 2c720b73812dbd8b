#include "shim.h"

#include <csetjmp>
#include <string>
#include <ucontext.h>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr std::size_t STACK_BYTES = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
};

enum class State { READY, AT_BARRIER, IN_WARP, TRAPPED, RETURNED };

struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    State state = State::READY;
    unsigned mask = 0;                               // IN_WARP: the lanes waited for
    Words bring{}, brought{};                        // to the exchange, and as the others see it
    std::vector<std::vector<Copy>> groups, current;  // asynchronous copies; `current` holds at most the open group
};

// One device for the process; kernels run on the calling thread.
std::vector<Fiber*> fibers;  // of the block, by linear thread index
std::vector<char> shared;
ucontext_t scheduler_context;
jmp_buf scheduler;
unsigned running;
void (*body)(void*);
void* body_context;
std::string error;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
void leaving_for(const void* stack, std::size_t bytes, void** fake) { __sanitizer_start_switch_fiber(fake, stack, bytes); }
void arrived(void* fake, const void** from, std::size_t* bytes) { __sanitizer_finish_switch_fiber(fake, from, bytes); }
#endif

Fiber& self() { return *fibers[running]; }

// From a fiber to the scheduler, until that goes on with it.
void pause() {
    Fiber& fiber = self();
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    leaving_for(scheduler_stack, scheduler_stack_bytes, &fake);
#endif
    if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
#ifdef __SANITIZE_ADDRESS__
    arrived(fake, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// A fiber outlives its CUDA thread: it becomes one of the next block.
void live() {
#ifdef __SANITIZE_ADDRESS__
    arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {
        body(body_context);
        async_copies_wait(0);
        self().state = State::RETURNED;
        pause();
    }
}

void go_on(unsigned thread) {
    Fiber& fiber = *fibers[thread];
    running = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    leaving_for(fiber.stack.data(), fiber.stack.size(), &fake);
#endif
    if (!_setjmp(scheduler)) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.start, live, 0);
        swapcontext(&scheduler_context, &fiber.start);  // once a fiber; from then on by longjmp, which needs no system call
    }
#ifdef __SANITIZE_ADDRESS__
    arrived(fake, nullptr, nullptr);
#endif
}

// Lets every exchange go on whose lanes are all there. False if none.
bool complete_exchanges(unsigned first, unsigned end) {
    bool any = false;
    for (unsigned thread = first; thread < end; ++thread) {
        const unsigned mask = fibers[thread]->mask;
        if (fibers[thread]->state != State::IN_WARP) continue;
        bool all = true;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) {
                const Fiber* other = first + lane < end ? fibers[first + lane] : nullptr;
                all = all && other && other->state == State::IN_WARP && other->mask == mask;
            }
        if (!all) continue;
        any = true;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) {
                fibers[first + lane]->brought = fibers[first + lane]->bring;
                fibers[first + lane]->state = State::READY;
            }
    }
    return any;
}

// Runs the lanes of a warp until each has returned or waits for other warps.
void run_warp(unsigned first, unsigned end, bool backwards) {
    do {
        for (unsigned i = 0; i < end - first; ++i) {
            const unsigned thread = backwards ? end - 1 - i : first + i;
            if (fibers[thread]->state == State::READY) go_on(thread);
        }
    } while (complete_exchanges(first, end));
}

std::string described(unsigned thread) {
    const char* does[] = {"runs", "waits at __syncthreads", "waits for lanes of its warp", "is trapped", "has returned"};
    const std::string where = "thread " + std::to_string(thread) + " of block (" + std::to_string(blockIdx.x) + ", " +
                              std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ") ";
    return where + does[static_cast<int>(fibers[thread]->state)];
}

void run_block(unsigned threads, bool backwards) {
    const unsigned warps = (threads + 31) / 32;
    for (unsigned thread = 0; thread < threads; ++thread) fibers[thread]->state = State::READY;
    for (;;) {
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned first = 32 * (backwards ? warps - 1 - i : i);
            run_warp(first, std::min(first + 32, threads), backwards);
        }
        for (unsigned thread = 0; thread < threads; ++thread)
            if (fibers[thread]->state == State::IN_WARP) {
                error = described(thread) + " that never come";
                return;
            } else if (fibers[thread]->state == State::TRAPPED) {
                error = described(thread);
                return;
            }
        for (unsigned thread = 1; thread < threads; ++thread)
            if (fibers[thread]->state != fibers[0]->state) {
                error = described(thread) + ", but " + described(0);
                return;
            }
        if (fibers[0]->state == State::RETURNED) return;
        for (unsigned thread = 0; thread < threads; ++thread) fibers[thread]->state = State::READY;
    }
}

}  // namespace

const char* run(const Geometry& geometry, void (*thread)(void*), void* context) {
    const unsigned threads = geometry.block.x * geometry.block.y * geometry.block.z;
    const std::uint64_t blocks = std::uint64_t(geometry.grid.x) * geometry.grid.y * geometry.grid.z;
    blockDim = geometry.block;
    gridDim = geometry.grid;
    body = thread;
    body_context = context;
    error.clear();
    while (fibers.size() < threads) fibers.push_back(new Fiber);
    for (std::uint64_t i = 0; i < blocks && error.empty(); ++i) {
        const std::uint64_t block = geometry.backwards ? blocks - 1 - i : i;
        blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                    unsigned(block / gridDim.x / gridDim.y)};
        std::vector<char>(geometry.shared_bytes, char(0xff)).swap(shared);  // not a number, in every type
        run_block(threads, geometry.backwards);
    }
    if (error.empty()) return nullptr;
    fibers.clear();  // what they were in the middle of is lost, and their memory with it
    return error.c_str();
}

void* dynamic_shared() { return shared.data(); }

unsigned lane() { return running % 32; }

void trap() {
    self().state = State::TRAPPED;
    pause();
}

void block_barrier() {
    self().state = State::AT_BARRIER;
    pause();
}

const Words* exchange(unsigned mask, const Words& mine) {
    Fiber& fiber = self();
    fiber.bring = mine;
    fiber.mask = mask;
    fiber.state = State::IN_WARP;
    pause();
    static Words all[32];
    const unsigned first = running / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) all[lane] = fibers[first + lane]->brought;
    return all;
}

void async_copy(void* to, const void* from, unsigned bytes) {
    Fiber& fiber = self();
    if (fiber.current.empty()) fiber.current.emplace_back();
    fiber.current.back().push_back({to, from, bytes});
}

void async_copies_end_group() {
    Fiber& fiber = self();
    fiber.groups.push_back(fiber.current.empty() ? std::vector<Copy>() : std::move(fiber.current.back()));
    fiber.current.clear();
}

void async_copies_wait(int pending_groups) {
    std::vector<std::vector<Copy>>& groups = self().groups;
    while (groups.size() > std::size_t(pending_groups)) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

}  // namespace shim
