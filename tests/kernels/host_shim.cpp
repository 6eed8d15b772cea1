// SPDX-License-Identifier: Apache-2.0
// The fibers of host_shim.hpp: memory, the scheduler of threads and blocks, barriers, faults.
#include "host_shim.hpp"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <link.h>
#include <sys/mman.h>

namespace cuda_host {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024, dynamic_shared_limit = 232 * 1024, page = 4096;
constexpr std::uint64_t nap_limit = 200'000;
// Blocks of a grid run one after another, or several side by side (Launch::resident). In the latter case, a block's shared
// memory is saved to its `image` while another block runs.
struct Block {
    uint3 index{};
    unsigned slot = 0;
    std::vector<Thread> threads;
    std::vector<unsigned char> image;
};
Block* block = nullptr; // the running block
ucontext_t scheduler;
sigjmp_buf escape;
std::uint64_t naps = 0; // since a block ended
Launch* launch = nullptr;
void (*kernel_body)() = nullptr;

// Fills memory that nothing was written to yet. Descending runs use another value, so that a NaN can't hide an access to it.
unsigned char poison() { return launch->order == 1 ? 0x5a : 0xff; }

unsigned char* map(std::size_t bytes, int protection = PROT_READ | PROT_WRITE) {
    void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) { std::perror("host_shim: mmap"); std::abort(); }
    return static_cast<unsigned char*>(memory);
}
std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

unsigned char* stacks(unsigned slot) {
    static std::vector<unsigned char*> of;
    while (of.size() <= slot) of.push_back(map(1024 * stack_bytes));
    return of[slot];
}

int module_info(dl_phdr_info* info, std::size_t, void* out) {
    auto* found = static_cast<dl_phdr_info*>(out);
    const auto here = reinterpret_cast<std::uintptr_t>(&module_info);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        const auto begin = info->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz) { *found = *info; return 1; }
    }
    return 0;
}

// The memory of __shared__ variables: the module's TLS block.
std::pair<unsigned char*, std::size_t> static_shared_memory() {
    *static_cast<volatile unsigned char*>(&shared_memory_anchor) = 0; // the first access allocates the block
    dl_phdr_info info{};
    dl_iterate_phdr(module_info, &info);
    for (int i = 0; i < info.dlpi_phnum; ++i)
        if (info.dlpi_phdr[i].p_type == PT_TLS) return {static_cast<unsigned char*>(info.dlpi_tls_data), info.dlpi_phdr[i].p_memsz};
    return {};
}

void switch_to(Block& next) {
    if (block == &next) return;
    const auto [fixed, fixed_size] = static_shared_memory();
    const std::size_t dynamic_size = round_up(launch->shared_bytes, page);
    if (block) {
        block->image.resize(fixed_size + dynamic_size);
        std::memcpy(block->image.data(), fixed, fixed_size);
        std::memcpy(block->image.data() + fixed_size, dynamic_shared_memory, dynamic_size);
    }
    block = &next;
    block_index = next.index;
    if (next.image.empty()) {
        std::memset(fixed, poison(), fixed_size);
        std::memset(dynamic_shared_memory, poison(), dynamic_size);
    } else {
        std::memcpy(fixed, next.image.data(), fixed_size);
        std::memcpy(dynamic_shared_memory, next.image.data() + fixed_size, dynamic_size);
    }
}

void on_signal(int number, siginfo_t* info, void* raw) {
    const auto* context = static_cast<ucontext_t*>(raw);
    dl_phdr_info module{};
    dl_iterate_phdr(module_info, &module);
    launch->fault_offset = static_cast<std::uint64_t>(context->uc_mcontext.gregs[REG_RIP]) - module.dlpi_addr;
    switch (number) {
    case SIGILL: fail("undefined behaviour (null pointer, misaligned access, overflow, division by zero, shift or index out of range)");
    case SIGFPE: fail("integer division by zero or overflow");
    default: fail("access outside any buffer, at %p", info->si_addr);
    }
}

void thread_main() {
    kernel_body();
    current->state = State::ended;
    swapcontext(&current->context, &scheduler);
}

std::uint64_t next_random(std::uint64_t& state) { // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 2685821657736338717ull;
}
void arrange(std::vector<std::uint64_t>& order, std::uint64_t& seed) {
    if (launch->order >= 2)
        for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(seed) % i]);
}
std::vector<std::uint64_t> in_order(std::uint64_t count) {
    std::vector<std::uint64_t> order(count);
    for (std::uint64_t i = 0; i < count; ++i) order[i] = launch->order == 1 ? count - 1 - i : i;
    return order;
}

void release_waiting() {
    std::size_t waiting = 0, ended = 0;
    int votes = 0;
    for (Thread& thread : block->threads) {
        waiting += thread.state == State::at_barrier;
        ended += thread.state == State::ended;
        if (thread.state == State::at_barrier) votes += thread.predicate != 0;
    }
    if (waiting && waiting + ended == block->threads.size())
        for (Thread& thread : block->threads)
            if (thread.state == State::at_barrier) {
                thread.state = State::ready;
                thread.votes = votes;
                thread.voters = static_cast<int>(waiting);
            }
    if (ended) // a collective may have been waiting only for lanes that have now ended
        for (Thread& thread : block->threads)
            if (thread.state == State::at_collective) complete_collective(thread);
}

[[noreturn]] void report_deadlock(std::size_t ended) {
    const Thread *at_barrier = nullptr, *at_collective = nullptr;
    for (const Thread& thread : block->threads) {
        if (thread.state == State::at_barrier) at_barrier = &thread;
        if (thread.state == State::at_collective) at_collective = &thread;
    }
    fail("deadlock in block (%u, %u, %u): %zu of %zu threads ended, thread %u waits in %s, thread %u in %s", block_index.x,
         block_index.y, block_index.z, ended, block->threads.size(), at_barrier ? at_barrier->linear : 0,
         at_barrier ? at_barrier->operation : "nothing", at_collective ? at_collective->linear : 0,
         at_collective ? at_collective->operation : "nothing");
}

void begin_block(Block& one, std::uint64_t number) {
    one.index = {unsigned(number % grid_size.x), unsigned(number / grid_size.x % grid_size.y), unsigned(number / grid_size.x / grid_size.y)};
    one.image.clear();
    const std::size_t count = std::size_t(block_size.x) * block_size.y * block_size.z;
    one.threads.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
        Thread& thread = one.threads[i];
        thread.linear = static_cast<unsigned>(i);
        thread.index = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y), unsigned(i / block_size.x / block_size.y)};
        thread.state = State::ready;
        thread.copies.assign(1, {});
        getcontext(&thread.context);
        thread.context.uc_stack = {stacks(one.slot) + i * stack_bytes, 0, stack_bytes};
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, thread_main, 0);
    }
}

// Runs each of the block's warps as far as it can go alone, so that the others are as late as possible; if `brief`, runs only one
// warp until its lanes wait. Returns whether all threads have ended.
bool run_round(bool brief, std::uint64_t& seed) {
    auto& threads = block->threads;
    const std::size_t count = threads.size();
    auto warps = in_order((count + 31) / 32), lanes = in_order(32);
    bool progress = false;
    for (Thread& thread : threads)
        if (thread.state == State::asleep) thread.state = State::ready;
    arrange(warps, seed);
    for (const auto warp : warps) {
        for (bool again = true; again;) {
            again = false;
            arrange(lanes, seed);
            for (const auto lane : lanes) {
                const auto i = warp * 32 + lane;
                if (i >= count || threads[i].state != State::ready) continue;
                again = progress = true;
                current = &threads[i];
                swapcontext(&scheduler, &threads[i].context);
                current = nullptr;
            }
            if (brief && progress) break;
        }
        if (brief && progress) break;
    }
    std::size_t ended = 0;
    for (const Thread& thread : threads) ended += thread.state == State::ended;
    if (!progress && ended < count) report_deadlock(ended);
    release_waiting();
    if (ended < count) return false;
    for (std::size_t i = launch->shared_bytes; i < round_up(launch->shared_bytes, page); ++i)
        if (dynamic_shared_memory[i] != poison()) fail("write %zu bytes past the end of dynamic shared memory", i - launch->shared_bytes + 1);
    return true;
}

// A device buffer. Its end, rounded up to 32 bytes, is at an inaccessible page; the bytes around the data are poison and must stay so.
struct Buffer {
    unsigned char *mapping = nullptr, *data = nullptr, *end = nullptr;
    std::size_t length = 0;
    Argument* argument = nullptr;

    explicit Buffer(Argument& a) : argument(&a) {
        const std::size_t need = round_up(a.size + a.offset, 32), body = round_up(std::max<std::size_t>(need, 1), page);
        length = body + 2 * page;
        mapping = map(length, PROT_NONE);
        mprotect(mapping + page, body, PROT_READ | PROT_WRITE);
        std::memset(mapping + page, poison(), body);
        end = mapping + page + body;
        data = end - need + a.offset;
        std::memcpy(data, a.data, a.size);
        if (!a.writable) mprotect(mapping + page, body, PROT_READ);
    }
    bool intact() const {
        for (unsigned char* p = mapping + page; p < end; ++p)
            if ((p < data || p >= data + argument->size) && *p != poison()) return false;
        return true;
    }
    void finish() {
        if (argument->writable) std::memcpy(argument->data, data, argument->size);
        munmap(mapping, length);
    }
};

void run_grid() {
    block_size = {launch->block[0], launch->block[1], launch->block[2]};
    grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    const std::uint64_t count = std::uint64_t(block_size.x) * block_size.y * block_size.z;
    if (count == 0 || count > 1024 || launch->shared_bytes > dynamic_shared_limit || launch->resident == 0) fail("invalid launch configuration");
    std::uint64_t seed = launch->order * 0x9e3779b97f4a7c15ull + 1;
    auto order = in_order(std::uint64_t(grid_size.x) * grid_size.y * grid_size.z);
    arrange(order, seed);
    static std::vector<Block> slots;
    block = nullptr, naps = 0;
    slots.clear(), slots.resize(std::min<std::uint64_t>(launch->resident, order.size()));
    std::size_t begun = 0;
    std::vector<Block*> running;
    for (Block& one : slots) {
        one.slot = static_cast<unsigned>(&one - slots.data());
        begin_block(one, order[begun++]);
        running.push_back(&one);
    }
    for (std::size_t turn = 0; !running.empty(); ++turn) {
        const std::size_t i = (launch->order >= 2 ? next_random(seed) : turn) % running.size();
        switch_to(*running[i]);
        if (!run_round(launch->order >= 2 && slots.size() > 1, seed)) continue;
        block = nullptr, naps = 0;
        if (begun < order.size()) begin_block(*running[i], order[begun++]);
        else running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

// Copies the arrays to device buffers, runs the grid and copies the buffers back, even if the launch failed.
int run_with_buffers(std::size_t count, const bool* is_pointer) {
    if (launch->argument_count != count) fail("the kernel takes %zu arguments, %zu were given", count, std::size_t(launch->argument_count));
    static std::vector<Buffer> buffers;
    static std::vector<unsigned char*> of;
    buffers.clear(), buffers.reserve(count), of.assign(count + 1, nullptr);
    for (std::size_t i = 0; i < count; ++i) {
        if (is_pointer[i] != (launch->arguments[i].kind == 2)) fail("argument %zu: an array must be given for a pointer, and for nothing else", i);
        if (is_pointer[i] && launch->arguments[i].data) of[i] = buffers.emplace_back(launch->arguments[i]).data;
    }
    arguments = launch->arguments, device_pointers = of.data();
    volatile int status = 1;
    if (sigsetjmp(escape, 1) == 0) {
        run_grid();
        for (const Buffer& buffer : buffers)
            if (!buffer.intact()) fail("a write outside the buffer of argument %d", int(buffer.argument - launch->arguments));
        status = 0;
    }
    for (Buffer& buffer : buffers) buffer.finish();
    return status;
}

} // namespace

unsigned char* const dynamic_shared_memory = map(dynamic_shared_limit + page);

void fail(const char* format, ...) {
    char text[768];
    std::va_list rest;
    va_start(rest, format);
    std::vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    if (current)
        std::snprintf(launch->message, launch->message_size, "block (%u, %u, %u), thread (%u, %u, %u): %s", block_index.x,
                      block_index.y, block_index.z, current->index.x, current->index.y, current->index.z, text);
    else
        std::snprintf(launch->message, launch->message_size, "%s", text);
    siglongjmp(escape, 1);
}

void wait(State state, const char* operation) {
    current->state = state;
    current->operation = operation;
    Thread* self = current;
    swapcontext(&self->context, &scheduler);
    current = self;
}

void pause() {
    if (launch->resident > 1) wait(State::asleep, "a pause");
}

void nap() {
    if (++naps > nap_limit) fail("waits in __nanosleep for what no running block does");
    wait(State::asleep, "__nanosleep");
}

bool complete_collective(Thread& one) {
    auto& threads = block->threads;
    const unsigned first = one.linear / 32 * 32, count = std::min<unsigned>(32, threads.size() - first);
    unsigned char values[32][16];
    std::memset(values, poison(), sizeof values);
    for (unsigned lane = 0; lane < count; ++lane) {
        const Thread& other = threads[first + lane];
        if (!(one.mask >> lane & 1) || other.state == State::ended) continue;
        if (other.state != State::at_collective) return false;
        if (other.mask != one.mask || std::strcmp(other.operation, one.operation) != 0)
            fail("lane %u is in %s with mask %08x, lane %u in %s with mask %08x", one.linear % 32, one.operation, one.mask, lane,
                 other.operation, other.mask);
        std::memcpy(values[lane], other.outbox, 16);
    }
    for (unsigned lane = 0; lane < count; ++lane) {
        Thread& other = threads[first + lane];
        if (!(one.mask >> lane & 1) || other.state == State::ended) continue;
        std::memcpy(other.inbox, values, sizeof values);
        other.state = State::ready;
    }
    return true;
}

bool present(unsigned lane) {
    const unsigned linear = current->linear / 32 * 32 + lane;
    const auto& threads = block->threads;
    return (current->mask >> lane & 1) && linear < threads.size() && threads[linear].state != State::ended;
}

int run(Launch* what, std::size_t count, const bool* is_pointer, void (*body)()) {
    launch = what, kernel_body = body;
    static unsigned char* signal_stack = map(64 * 1024);
    stack_t alternate{signal_stack, 0, 64 * 1024}, previous_stack;
    sigaltstack(&alternate, &previous_stack);
    struct sigaction action{}, previous[4];
    constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &previous[i]);
    volatile int status = 1;
    if (sigsetjmp(escape, 1) == 0) status = run_with_buffers(count, is_pointer);
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &previous[i], nullptr);
    sigaltstack(&previous_stack, nullptr);
    current = nullptr;
    return status;
}

} // namespace cuda_host
